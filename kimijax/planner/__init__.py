"""What a job of a model needs on a pod of chips: in closed form, and proven by their compiler."""
