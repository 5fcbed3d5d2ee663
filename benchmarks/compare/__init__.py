"""Times this library, the released code of AWP and PyTorch in turns."""
