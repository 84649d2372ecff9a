"""Mutations of valid files, fed to whatever reads files and answers from elsewhere."""
