"""Spiking networks: neurons, encoders, decoders and the networks made of them.

Activity has a time axis in front, [T, B, *space, C]. One visible dict a kind, as in `lissom.models`.
"""

ACTIVATIONS = {
    "if": "lissom.models.spiking.neurons:IF",
    "lif": "lissom.models.spiking.neurons:LIF",
    "plif": "lissom.models.spiking.neurons:PLIF",
    "alif": "lissom.models.spiking.neurons:ALIF",
    "cuba": "lissom.models.spiking.neurons:CUBA",
    "relu": "lissom.models.spiking.activations:ReLU",
    "clip_floor": "lissom.models.spiking.activations:ClipFloor",
}

ENCODERS = {
    "direct": "lissom.models.spiking.encoders:Direct",
    "rate": "lissom.models.spiking.encoders:Rate",
    "latency": "lissom.models.spiking.encoders:Latency",
    "phase": "lissom.models.spiking.encoders:Phase",
    "frames": "lissom.models.spiking.encoders:Frames",
    "delta": "lissom.models.spiking.encoders:Delta",
    "stacked": "lissom.models.spiking.encoders:Stacked",
}

DECODERS = {
    "mean": "lissom.models.spiking.decoders:Mean",
    "count": "lissom.models.spiking.decoders:Count",
    "max_membrane": "lissom.models.spiking.decoders:MaxMembrane",
    "first_spike": "lissom.models.spiking.decoders:FirstSpike",
}
