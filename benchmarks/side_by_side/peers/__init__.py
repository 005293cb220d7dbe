"""What megamoe is measured beside, one peer a file.

Each says whether it is the real package, or an algorithm that was written anew for this benchmark from its
published description and so is labelled as such. All peers take their weights from ours by `load_state_dict`
or by name, so that they can be compared before they are timed.
"""
