"""What our trainers are made of; each file one habit that nnU-Net's trainer lacks."""
