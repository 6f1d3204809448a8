"""Runs and measurements compared: tables, figures and pages."""
