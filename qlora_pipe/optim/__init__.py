"""The optimizer whose states need not fit on the device."""
