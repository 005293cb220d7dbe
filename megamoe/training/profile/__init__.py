"""Where the time of a training step goes: a few steps are recorded, and their time is told by room."""
