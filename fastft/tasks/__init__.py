"""Tasks: how rows become features, which model, which loss, which metrics, which predictions. One file each."""
