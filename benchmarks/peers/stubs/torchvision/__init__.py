"""Stands in for torchvision where open_clip only needs its names, in the environment of the peers alone.

open_clip imports torchvision's picture transforms and one layer when it is imported, whether they are used
or not. What evaluation uses (resize, centre crop, to tensor, normalize) works here, through Pillow and
torch as torchvision itself does it; what only training uses raises. Preprocessing is therefore no
peer: its pixels are compared with recorded ones, not with this.
"""

__version__ = "0.0.0"
