"""The verb `model`: the committed checkpoint, and models timed next to other programs."""
