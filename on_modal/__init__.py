"""Modal's side of train_modal.py: what its containers run, what Modal is asked for, and the runs on its Volumes."""
