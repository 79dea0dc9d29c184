"""Pictures of what a trained network does."""
