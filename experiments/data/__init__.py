"""Loads images from disk and makes batches on the device.

`datasets` loads the labeled data, `extra_images` additional images. `batches`
and `augmentation` run inside the compiled step.
"""
