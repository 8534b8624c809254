"""Examples that models are trained and tested on: needles, domains, the training mixture."""
