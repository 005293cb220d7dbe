"""The mixture layer, written as if for one device."""
