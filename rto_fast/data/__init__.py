"""Data: sources and their layouts, chat templates and tokenising. Import from the modules."""
