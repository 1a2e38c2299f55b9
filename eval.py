"""stub"""
def report_run(workdir, result): print(result)
