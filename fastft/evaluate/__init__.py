"""Looking at data and models without training: validate, eval, predict, export."""
