"""`nnunet_l2g adapt`: prepares an unlabelled target dataset for a labelled source dataset."""
