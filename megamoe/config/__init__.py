"""What a run is: typed options, presets, and the rules that combine them. No torch in this room."""

from megamoe.config.load import from_dict, load_config
from megamoe.config.schema import RunConfig

__all__ = ["RunConfig", "from_dict", "load_config"]
