"""Progress lines, plots and pages."""
