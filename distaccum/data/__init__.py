"""Reference datasets that need no download, and the default collate.

Any map-style `torch.utils.data.Dataset` can take their place (`data=custom`). scikit-learn, scikit-image and Pillow are
imported only by the datasets that need them.
"""

from distaccum.data.augment import Augment
from distaccum.data.coins import Coins
from distaccum.data.digits import Digits, DigitViews
from distaccum.data.image_folder import ImageFolder
from distaccum.data.language import LanguageData
from distaccum.data.mix import Mix
from distaccum.data.mixing import Mixed, Mixing
from distaccum.data.rows import HubDataset, Rows
from distaccum.data.stream import Stream
from distaccum.data.stream_sources import Lines, Shards
from distaccum.data.synthetic import Synthetic
from distaccum.data.text import DocumentationText
from distaccum.data.token_data import TokenData
from distaccum.data.tokenize_row import TokenizeRow
from distaccum.data.webdataset import WebDataset
from distaccum.loaders.collate import PadCollate

__all__ = [
    "Augment",
    "Coins",
    "DigitViews",
    "Digits",
    "DocumentationText",
    "HubDataset",
    "ImageFolder",
    "LanguageData",
    "Lines",
    "Mix",
    "Mixed",
    "Mixing",
    "PadCollate",
    "Rows",
    "Shards",
    "Stream",
    "Synthetic",
    "TokenData",
    "TokenizeRow",
    "WebDataset",
]
