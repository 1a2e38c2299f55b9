"""Which layer gets how many bits: how much each one minds (sensitivities), and the choice within a budget (solvers)."""
