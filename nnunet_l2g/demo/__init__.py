"""`nnunet_l2g demo`: the steps, and the report with its picture."""
