"""What every chapter stands on: techniques, tasks, readings, surgery, files, training, generation."""
