"""What happens while weights are learned. The dicts name what a config may choose; nothing here imports jax."""

OBJECTIVES = {
    "classification": "lissom.training.objectives.classification:Classification",
    "language_modelling": "lissom.training.objectives.language_modelling:LanguageModelling",
    "branch_training": "lissom.training.objectives.branch_training:BranchTraining",
    "router_tuning": "lissom.training.objectives.router_tuning:RouterTuning",
    "mixture_likelihood": "lissom.training.objectives.mixture_likelihood:MixtureLikelihood",
    "trajectories": "lissom.training.objectives.trajectories:Trajectories",
    "maml": "lissom.training.meta.gradient_based:MAML",
    "fomaml": "lissom.training.meta.gradient_based:FirstOrderMAML",
    "anil": "lissom.training.meta.gradient_based:ANIL",
    "meta_sgd": "lissom.training.meta.gradient_based:MetaSGD",
    "imaml": "lissom.training.meta.implicit:ImplicitMAML",
    "reptile": "lissom.training.meta.reptile:Reptile",
    "protonet": "lissom.training.meta.prototypes:PrototypicalNetworks",
    "supervised": "lissom.training.meta.supervised:Supervised",
    "beclr": "lissom.training.meta.contrastive:BECLR",
    "in_context": "lissom.training.objectives.in_context:InContext",
    "conditional_noise": "lissom.training.objectives.conditional_noise:ConditionalNoise",
    "distillation": "lissom.training.objectives.distillation:Distillation",
}

OPTIMIZERS = {
    "adamw": "lissom.training.optimizers:adamw",
    "sgd": "lissom.training.optimizers:sgd",
    "lion": "lissom.training.optimizers:lion",
}

SCHEDULES = {
    "cosine": "lissom.training.optimizers:cosine",
    "linear": "lissom.training.optimizers:linear",
    "constant": "lissom.training.optimizers:constant",
}
