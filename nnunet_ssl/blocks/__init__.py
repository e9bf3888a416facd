"""Things with weights that a training owns besides the plan's network, and what is known about networks."""
