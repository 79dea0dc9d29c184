"""The commands of `nnunet_l2g`, one module each: configure(parser) and run(args) -> exit status."""
