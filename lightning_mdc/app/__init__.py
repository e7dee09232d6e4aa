"""What only the command line needs: from settings to a run of steps, with its data, its report and its dashboards."""
