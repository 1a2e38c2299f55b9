"""Event streams of brightness change, as an event camera (dynamic vision sensor, DVS) gives them and frames of them."""
