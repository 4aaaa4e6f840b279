"""Ray: files for its cluster launcher and for KubeRay, and a throwaway Ray on one machine."""
