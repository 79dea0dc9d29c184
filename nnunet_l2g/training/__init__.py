"""What trainers are made of, for all methods: checkpoints, pretraining stages, names with lengths and runs, losses, figures."""
