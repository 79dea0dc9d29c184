"""What `nnunet_l2g demo` is made of: the folder it may write, the steps, the runner of child processes, the picture."""
