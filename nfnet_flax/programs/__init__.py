"""What compilers make of a training step: reading compiled programs, and planning for devices that are not here."""
