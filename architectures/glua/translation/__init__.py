"""Unpaired image translation between two domains: the pretraining stage of GLUA."""
