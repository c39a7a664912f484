"""What a recipe costs in learning: how much of the update that the optimizer intends reaches the
values that it stores."""
