"""What `nnunet_l2g compare` is made of: results read, paired statistics, cost, tables, plots, page."""
