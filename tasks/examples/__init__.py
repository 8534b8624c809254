"""What is asked: needles, questions by domain, the training mixture."""
