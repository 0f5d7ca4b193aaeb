"""`dht compare`: every rival of the protocol on the same splits, backbone, tokens and seeds, and a verdict a claim.

settings.py    what a comparison is told
trainings.py   the models that are trained, each once, and shared by the cells that need them
dropping.py    training by dropping layers: two of the training rivals
shapes.py      static sub-networks near a cost
matching.py    prices, thresholds and plans matched to a cost on validation
policies.py    shuffled context, cascade
arms.py        all fixed arms of a model: the best one, and the oracle
methods.py     the rivals: what each one trains, what it serves
ablations.py   one switch each
cells.py       one cell = one row of the result: (method, budget, seed)
regret.py      the policy against the best fixed depth and the oracle, over training
run.py         runs what is missing, in one process or several
statistics.py  means, Student intervals, frontiers
verdict.py     holds, tie or fails
"""
