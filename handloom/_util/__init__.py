"""What every wing uses: when, progress, warnings, values as JSON."""
