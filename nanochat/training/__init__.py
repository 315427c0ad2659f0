"""Around the training loop: launch, resume, saving, guard, compilation, schedule, tracking."""
