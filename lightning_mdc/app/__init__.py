"""What only ``train.py`` needs: from settings to a run of steps, with its data, its report and its dashboards."""
