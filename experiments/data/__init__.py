"""From files on disk to batches of images on the device.

`datasets` loads the labeled data, `extra_images` additional images; `batches`
and `augmentation` run inside the compiled step.
"""
