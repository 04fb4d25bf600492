"""Reference datasets that need no download, and the default collate.

Any map-style `torch.utils.data.Dataset` can take their place (`data=custom`). scikit-learn, scikit-image and Pillow are
imported only by the datasets that need them.
"""

from distaccum.data.images.augment import Augment
from distaccum.data.images.coins import Coins
from distaccum.data.images.digits import Digits, DigitViews
from distaccum.data.images.image_folder import ImageFolder
from distaccum.data.images.mixing import Mixed, Mixing
from distaccum.data.language.language import LanguageData
from distaccum.data.language.text import DocumentationText
from distaccum.data.language.tokenize_row import TokenizeRow
from distaccum.data.mix import Mix
from distaccum.data.rows.rows import HubDataset, Rows
from distaccum.data.streams.stream import Stream
from distaccum.data.streams.stream_sources import Lines, Shards
from distaccum.data.synthetic import Synthetic
from distaccum.data.tars.webdataset import WebDataset
from distaccum.data.tokens.token_data import TokenData
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
