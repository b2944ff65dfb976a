"""The image codec: input files to RGB images within limits, and images to files with their hash.

Inputs can come from any sender. Each limit is checked before the work that it limits: bytes before
parsing, and pixels, from the header, before decoding. Pillow decodes a new file that contains only
what decoding needs: no metadata, and no data after the image's end. Pillow's global state is not
changed, because other parts of the process use Pillow too.
"""
