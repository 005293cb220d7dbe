from hypothesis import settings

# Examples take as long as the busy machine lets them.
settings.register_profile("data", deadline=None, max_examples=50)
settings.load_profile("data")
