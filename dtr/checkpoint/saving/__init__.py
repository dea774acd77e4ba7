"""What happens to a save after the copy, on the trainer's side: published, watched, reported when it fails."""
