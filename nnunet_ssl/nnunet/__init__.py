"""What this package knows of nnU-Net: its folders, JSON files, plans, label files and how it finds trainers."""
