"""The embedded describer as a captioner: it measures pictures of the embedded world and looks at no prompt."""

from diffpref.captioners.base import Captioner, CaptionOptions
from diffpref.embedded.describer import Describer

TAKES: tuple[str, ...] = ()


def version(options: CaptionOptions) -> str:
    """The describer's."""
    return Describer().version


def load(options: CaptionOptions) -> Captioner:
    """The describer; it is NumPy and has no options."""
    return Describer()
