"""What a rank's own work costs as models and worlds grow."""
