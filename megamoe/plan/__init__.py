"""What a run needs and how long it takes, by arithmetic, before it is started."""
