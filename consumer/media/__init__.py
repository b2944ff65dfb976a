"""Images: input files to RGB images within limits, and images to files with their hash.

Inputs come from anyone who may publish. Each limit is checked before the work that it limits: bytes
before parsing, pixels from the header before decoding. Pillow decodes a new file that holds only
what decoding needs: no metadata, and nothing from behind the image's end. Nothing of Pillow's
global state is changed, because other parts of the process use Pillow too.
"""
