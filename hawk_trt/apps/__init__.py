"""What people do with the core. An app imports the core and no other app; apps/cli alone imports them all."""
